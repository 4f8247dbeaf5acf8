"""Names that other projects give to the weights of text encoders."""

from clip_lite_jax.models.bert import Bert
from clip_lite_jax.models.transformer import ClipText
from clip_lite_jax.pretrained.names import Link, Naming, linear_links, norm_links
from clip_lite_jax.pretrained.vit import CLIP, block_links


def bert_namings(module: Bert) -> tuple[Naming, ...]:
    """Hugging Face's BERT or MPNet, inside sentence-transformers' folders too."""
    if module.relative_buckets:
        return (_hugging_face_mpnet(module),)
    return tuple(
        _hugging_face_bert(module, *names) for names in (("weight", "bias"), ("gamma", "beta"))
    )


def _hugging_face_bert(module: Bert, scale: str, shift: str) -> Naming:
    """`scale` and `shift` end the names of a LayerNorm: they were called otherwise at first."""
    links = [
        Link("params/words/embedding", "embeddings.word_embeddings.weight"),
        Link("params/places/embedding", "embeddings.position_embeddings.weight"),
        Link("params/types/embedding", "embeddings.token_type_embeddings.weight"),
        *_norm("norm", "embeddings.LayerNorm", scale, shift),
    ]
    for n in range(module.layers):
        ours, theirs = f"blocks_{n}", f"encoder.layer.{n}"
        for name in ("query", "key", "value"):
            links += linear_links(f"{ours}/{name}", f"{theirs}.attention.self.{name}")
        links += linear_links(f"{ours}/out", f"{theirs}.attention.output.dense")
        links += _norm(f"{ours}/norm1", f"{theirs}.attention.output.LayerNorm", scale, shift)
        links += linear_links(f"{ours}/fc1", f"{theirs}.intermediate.dense")
        links += linear_links(f"{ours}/fc2", f"{theirs}.output.dense")
        links += _norm(f"{ours}/norm2", f"{theirs}.output.LayerNorm", scale, shift)
    name = "Hugging Face BERT" if scale == "weight" else "an old BERT"
    return Naming(name, *_with_pooler(module, links))


def _hugging_face_mpnet(module: Bert) -> Naming:
    links = [
        Link("params/words/embedding", "embeddings.word_embeddings.weight"),
        Link("params/places/embedding", "embeddings.position_embeddings.weight"),
        *norm_links("norm", "embeddings.LayerNorm"),
        Link("params/relative/embedding", "encoder.relative_attention_bias.weight"),
    ]
    for n in range(module.layers):
        ours, theirs = f"blocks_{n}", f"encoder.layer.{n}"
        for name, short in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o")):
            links += linear_links(f"{ours}/{name}", f"{theirs}.attention.attn.{short}")
        links += norm_links(f"{ours}/norm1", f"{theirs}.attention.LayerNorm")
        links += linear_links(f"{ours}/fc1", f"{theirs}.intermediate.dense")
        links += linear_links(f"{ours}/fc2", f"{theirs}.output.dense")
        links += norm_links(f"{ours}/norm2", f"{theirs}.output.LayerNorm")
    return Naming("Hugging Face MPNet", *_with_pooler(module, links))


def _with_pooler(module: Bert, links: list[Link]) -> tuple[tuple[Link, ...], str]:
    """The links, and the regular expression of what else is in such a file."""
    unused = r"(^|\.)position_ids$|^cls\."
    if module.pooling == "pooler":
        return (*links, *linear_links("pooler", "pooler.dense")), unused
    return tuple(links), unused + r"|^pooler\."


def _norm(ours: str, theirs: str, scale: str, shift: str) -> list[Link]:
    return [
        Link(f"params/{ours}/scale", f"{theirs}.{scale}"),
        Link(f"params/{ours}/bias", f"{theirs}.{shift}"),
    ]


def clip_text_namings(module: ClipText) -> tuple[Naming, ...]:
    """OpenAI's CLIP and open_clip, whose custom text towers have ``text.`` before the names."""
    links = [
        Link("params/words/embedding", "token_embedding.weight"),
        Link("params/position", "positional_embedding"),
        *block_links(module.layers, "transformer.resblocks.{}", CLIP),
        *norm_links("norm", "ln_final"),
    ]
    unused = r"^visual\.|^logit_(scale|bias)$|^attn_mask$"
    unused += r"|^(input_resolution|context_length|vocab_size)$"
    if module.head_width is None:
        return (Naming("CLIP", tuple(links), rf"{unused}|^text_projection$"),)
    return (Naming("CLIP", (*links, Link("params/projection/kernel", "text_projection")), unused),)
