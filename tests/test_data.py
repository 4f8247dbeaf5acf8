"""Images, captions, tokenizer, tables and batches."""

import io
import pickle
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import draw, tiny_config
from PIL import Image

from clip_lite_jax.config import AugmentConfig, DataConfig
from clip_lite_jax.data import caption_ops, image_ops
from clip_lite_jax.data.bad_examples import BadExamples
from clip_lite_jax.data.image_ops import Opened
from clip_lite_jax.data.inputs import Pixels, TowerInputs
from clip_lite_jax.data.pipeline import TrainTransform, train_batches
from clip_lite_jax.data.records import Example
from clip_lite_jax.data.sources import Source, build_sources, captions_of, fingerprint
from clip_lite_jax.data.splits import split_of
from clip_lite_jax.data.tokenizer import (
    Tokenizer,
    load_or_train_tokenizer,
    load_tokenizer,
    train_tokenizer,
)
from clip_lite_jax.errors import BadImage, ConfigError, DataError
from clip_lite_jax.train_step import Batch

# --- Images ---------------------------------------------------------------------------------------


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_formats_decode_to_rgb(format: str) -> None:
    image = image_ops.decode(encoded(draw("square", "red"), format))
    assert image.mode == "RGB"
    red, green, _ = np.asarray(image)[16, 16]
    assert red > 200
    assert green < 60


def test_modes_decode_to_rgb() -> None:
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    np.testing.assert_array_equal(np.asarray(image_ops.decode(encoded(half))), 255)
    deep = Image.fromarray(np.full((4, 4), 65535, np.uint16))
    np.testing.assert_array_equal(np.asarray(image_ops.decode(encoded(deep))), 255)
    cmyk = Image.new("CMYK", (4, 4), (0, 0, 0, 0))
    np.testing.assert_array_equal(np.asarray(image_ops.decode(encoded(cmyk, "JPEG"))), 255)


def test_exif_rotation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to view
    data = encoded(Image.new("RGB", (8, 4)), "JPEG", exif=exif)
    assert image_ops.decode(data).size == (4, 8)


def test_unusable_images_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    good = encoded(draw("ring", "blue"))
    with pytest.raises(BadImage, match="empty file"):
        image_ops.decode(b"")
    with pytest.raises(BadImage, match="cannot be decoded"):
        image_ops.decode(b"not an image at all")
    with pytest.raises(BadImage, match="cannot be decoded"):
        image_ops.decode(good[: len(good) // 2])
    monkeypatch.setattr(image_ops, "MAX_PIXELS", 1000)
    with pytest.raises(BadImage, match="32x32 pixels, over 1,000"):
        image_ops.decode(good)


def test_resize_keeps_the_centre() -> None:
    wide = Image.new("RGB", (90, 30), "white")
    wide.paste((255, 0, 0), (30, 0, 60, 30))
    out = image_ops.resize_and_crop(wide, 10)
    assert out.shape == (10, 10, 3)
    np.testing.assert_array_equal(out[5, 5], (255, 0, 0))


def photograph(width: int, height: int) -> Image.Image:
    """Smooth, as photographs are: a JPEG of it loses little."""
    down, across = np.mgrid[0:height, 0:width]
    waves = [np.sin(across / 90 + k) * np.cos(down / 70 - k) for k in range(3)]
    return Image.fromarray((np.stack(waves, -1) * 120 + 128).astype(np.uint8))


WHOLE = AugmentConfig(crop_scale=(1, 1), crop_ratio=(4 / 3, 4 / 3), flip=0, jitter=0)


def test_large_photographs_are_decoded_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    image = photograph(1024, 768)
    opened = Opened(encoded(image, "JPEG", quality=95))
    assert opened.size == (1024, 768)
    assert opened.decoded().size == (1024, 768)
    assert opened.decoded(shrink=3.4).size == (512, 384)
    assert opened.decoded(shrink=100).size == (128, 96)
    out, _ = image_ops.augment(opened, 96, WHOLE, np.random.default_rng(0))
    expected, _ = image_ops.augment(Opened.of(image), 96, WHOLE, np.random.default_rng(0))
    assert np.abs(out.astype(int) - expected).mean() < 1.5
    png = Opened(encoded(image))
    assert png.decoded(shrink=8).size == (1024, 768)


def test_crops_of_a_turned_photograph_are_crops_of_the_upright_one() -> None:
    image = photograph(800, 600)
    for orientation, turn in ((6, Image.Transpose.ROTATE_90), (3, Image.Transpose.ROTATE_180)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        opened = Opened(encoded(image.transpose(turn), "JPEG", quality=95, exif=exif))
        assert opened.size == (800, 600)
        for seed in range(5):
            outs = [
                image_ops.augment(
                    some, 64, AugmentConfig(jitter=0, flip=0), np.random.default_rng(seed)
                )[0].astype(int)
                for some in (opened, Opened.of(image))
            ]
            assert np.abs(outs[0] - outs[1]).mean() < 2


def test_augmentation_follows_its_generator() -> None:
    image = draw("cross", "green")
    one, two, other = (
        image_ops.augment(Opened.of(image), 16, AugmentConfig(), np.random.default_rng(seed))[0]
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, two)
    assert one.shape == (16, 16, 3)
    assert one.dtype == np.uint8
    assert not np.array_equal(one, other)


def test_no_augmentation_is_a_plain_resize() -> None:
    config = AugmentConfig(crop_scale=(1, 1), crop_ratio=(1, 1), flip=0, jitter=0)
    image = draw("bar", "pink")
    out, flipped = image_ops.augment(Opened.of(image), 32, config, np.random.default_rng(0))
    np.testing.assert_array_equal(out, np.asarray(image))
    assert not flipped


def test_flip_mirrors() -> None:
    config = AugmentConfig(crop_scale=(1, 1), crop_ratio=(1, 1), flip=1, jitter=0)
    image = draw("triangle", "blue")
    out, flipped = image_ops.augment(Opened.of(image), 32, config, np.random.default_rng(0))
    np.testing.assert_array_equal(out, np.asarray(image)[:, ::-1])
    assert flipped


def test_crops_stay_inside_any_shape() -> None:
    rng = np.random.default_rng(0)
    config = AugmentConfig(crop_scale=(0.9, 1.0))
    for width, height in [(1, 1), (2, 300), (300, 2), (64, 64)]:
        for _ in range(50):
            left, upper, right, lower = image_ops._random_box(width, height, config, rng)
            assert 0 <= left < right <= width + 1e-6
            assert 0 <= upper < lower <= height + 1e-6


# --- Captions -------------------------------------------------------------------------------------


def test_left_and_right_swap() -> None:
    swap = caption_ops.swap_left_right
    assert swap("Left arrow, RIGHT hand, leftwards") == "Right arrow, LEFT hand, rightwards"
    whole = "a bright sky, copyright, upright piano, leftover food"
    assert swap(whole) == whole
    assert swap("a cat") == "a cat"


def test_tags_are_dropped_but_never_all() -> None:
    rng = np.random.default_rng(0)
    drop = caption_ops.drop_from_list
    assert drop("a plain caption", 0.9, rng) == "a plain caption"
    assert drop("card, game, wild", 0.0, rng) == "card, game, wild"
    seen = [drop("card, game, wild", 0.5, rng) for _ in range(300)]
    tags = [set(caption.split(", ")) for caption in seen]
    assert all(tag and tag <= {"card", "game", "wild"} for tag in tags)
    assert {len(tag) for tag in tags} == {1, 2, 3}
    assert len({caption for caption in seen if caption.count(",") == 2}) > 1  # orders vary


def test_captions_are_chosen_and_joined() -> None:
    captions = ("ant", "animal, insect", "ant", "bug, insect")
    assert caption_ops.choose(captions, "first") == ("ant",)
    assert caption_ops.choose(captions, "joined") == ("ant, animal, insect, bug",)
    assert caption_ops.choose(captions, "all") == caption_ops.choose(captions, "random") == captions


# --- Tokenizer ------------------------------------------------------------------------------------

CAPTIONS = ["a red circle", "two blue squares", "a green ring on red"] * 5


def test_tokenizer_is_deterministic_and_travels() -> None:
    model = train_tokenizer(CAPTIONS, 60)
    assert model == train_tokenizer(CAPTIONS, 60)
    tokenizer = pickle.loads(pickle.dumps(Tokenizer(model, 6)))
    tokens, mask = tokenizer(["A RED circle", "", "red " * 50])
    assert tokens.shape == mask.shape == (3, 6)
    np.testing.assert_array_equal(mask.sum(1) > 0, [True, False, True])
    assert mask[2].all()
    assert np.all(tokens[~mask] == 0)
    assert tokens.max() < tokenizer.vocab_size
    np.testing.assert_array_equal(tokens[0], tokenizer(["a red circle"])[0][0])


def test_tokenizer_files_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="data.tokenizer=/nowhere"):
        load_tokenizer("/nowhere", DataConfig())
    fake = tmp_path / "fake.model"
    fake.write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match="not a SentencePiece model"):
        load_tokenizer(fake, DataConfig())
    many = "".join(chr(0x4E00 + i) for i in range(500))
    with pytest.raises(DataError, match=r"data.vocab_size=60 is too small .* 500 different"):
        train_tokenizer([many], 60)
    with pytest.raises(DataError, match="no caption"):
        load_or_train_tokenizer([" "], DataConfig())


# --- Sources --------------------------------------------------------------------------------------


def test_table_groups_rows_of_one_image(pairs: Path) -> None:
    splits = build_sources(DataConfig(source=str(pairs)), BadExamples())
    assert sum(len(split) for split in splits.values()) == 48
    example = splits["train"][0]
    assert len(example.captions) == 2
    assert example.image == (pairs.parent / example.id).read_bytes()
    assert splits["train"].metadata(0).image == b""


def test_table_with_all_kinds_of_bad_rows(tmp_path: Path) -> None:
    draw("ring", "red").save(tmp_path / "good.png")
    (tmp_path / "inner").mkdir()
    draw("ring", "red").save(tmp_path / "outside.png")
    table = tmp_path / "inner" / "pairs.tsv"
    draw("ring", "red").save(tmp_path / "inner" / "good.png")
    rows = ["picture\ttext", "good.png\ta red ring", "gone.png\tx", "good.png\t ", "\ty"]
    rows += ["../outside.png\tz", f"{tmp_path}/outside.png\tz", "good.png"]
    table.write_text("\ufeff" + "\n".join(rows), encoding="utf-8")
    bad = BadExamples(tmp_path / "skipped.jsonl")
    config = DataConfig(
        source=str(table), image_column="picture", caption_columns=("text",), held_out=0
    )
    splits = build_sources(config, bad)
    assert [splits["train"].metadata(0).captions] == [("a red ring",)]
    listed = (tmp_path / "skipped.jsonl").read_text().splitlines()
    reasons = ["no such file", "empty caption", "no image path", "leaves", "leaves", "empty cap"]
    assert len(listed) == len(reasons) == len(bad)
    assert all(reason in line for reason, line in zip(reasons, listed, strict=True))


def test_tables_that_cannot_be_used(tmp_path: Path) -> None:
    table = tmp_path / "pairs.csv"
    config = DataConfig(source=str(table))
    with pytest.raises(DataError, match="pairs.csv"):
        build_sources(config, BadExamples())
    table.write_text("image,text\n")
    with pytest.raises(DataError, match="no column 'caption'; it has image, text"):
        build_sources(config, BadExamples())
    table.write_text("image,caption\nx.png,hello\n")
    with pytest.raises(DataError, match="no usable row"):
        build_sources(config, BadExamples())
    table.write_bytes(b"image,caption\nx.png,\xff\xfe\n")
    with pytest.raises(DataError, match="not UTF-8"):
        build_sources(config, BadExamples())
    with pytest.raises(
        DataError, match=r"data.source='emojis': neither a built-in source \(emoji, shapes\)"
    ):
        build_sources(DataConfig(source="emojis"), BadExamples())


def test_split_and_group_columns(tmp_path: Path) -> None:
    lines = ["image,caption,kind,part"]
    for name, kind, part in [("a", "x", "train"), ("b", "x", "train"), ("c", "y", "test")]:
        draw("ring", "red").save(tmp_path / f"{name}.png")
        lines.append(f"{name}.png,ring,{kind},{part}")
    table = tmp_path / "pairs.csv"
    table.write_text("\n".join(lines))
    config = DataConfig(source=str(table), group_column="kind", split_column="part")
    splits = build_sources(config, BadExamples())
    assert {name: len(split) for name, split in splits.items()} == {"train": 2, "test": 1}
    assert splits["train"].metadata(0).group == splits["train"].metadata(1).group == "x"


def test_an_empty_group_cell_is_no_group(tmp_path: Path) -> None:
    for name in "abc":
        draw("ring", "red").save(tmp_path / f"{name}.png")
    table = tmp_path / "pairs.csv"
    table.write_text("image,caption,kind\na.png,ring, x \nb.png,ring,\nc.png,ring\n")
    config = DataConfig(source=str(table), group_column="kind", held_out=0)
    source = build_sources(config, BadExamples())["train"]
    assert [source.metadata(i).group for i in range(3)] == ["x", "b.png", "c.png"]


def test_a_stray_quotation_mark_is_said_and_swallows_no_rows(tmp_path: Path) -> None:
    table = tmp_path / "pairs.csv"
    table.write_text('image,caption\na.png,ring\nb.png,"big" dog\nc.png,"small dog"\n')
    with pytest.raises(DataError, match=r"pairs.csv, after line 2: .* needs quotes around it"):
        build_sources(DataConfig(source=str(table)), BadExamples())


def test_splits_by_hash_are_stable() -> None:
    names = [f"image-{i}" for i in range(2000)]
    splits = [split_of(name, 0.1) for name in names]
    assert 0.07 < splits.count("test") / 2000 < 0.13
    assert 0.07 < splits.count("validation") / 2000 < 0.13
    assert split_of("image-7", 0.1) == split_of("image-7", 0.1)
    assert all(split_of(name, 0) == "train" for name in names)


def test_builtin_emoji_splits() -> None:
    splits = build_sources(DataConfig(), BadExamples())
    assert splits.keys() == {"train", "validation", "test", "artist_validation", "artist_test"}
    groups = {
        name: {split.metadata(i).group for i in range(len(split))} for name, split in splits.items()
    }
    assert not groups["train"] & groups["validation"]
    assert not groups["train"] & groups["test"]
    assert not groups["validation"] & groups["test"]
    assert groups["artist_test"] <= groups["train"]
    assert len(list(captions_of(splits["train"]))) > 2 * len(splits["train"])


def test_too_many_bad_examples_stop_the_run(tmp_path: Path) -> None:
    bad = BadExamples(tmp_path / "skipped.jsonl", max_share=0.2, total=10)
    bad.add("a", "broken")
    bad.add("a", "broken")
    bad.add("b", "broken")
    with pytest.raises(DataError, match=r"3 of 10 examples cannot be used .*c: gone"):
        bad.add("c", "gone")
    with (tmp_path / "skipped.jsonl").open("a") as file:
        file.write('{"id": "d", "rea')  # the disk was full
    assert len(BadExamples(tmp_path / "skipped.jsonl")) == 3


# --- Batches --------------------------------------------------------------------------------------


def transform_for(pairs: Path, threads: int = 0) -> TrainTransform:
    config = tiny_config(pairs).data
    bad = BadExamples()
    source = build_sources(config, bad)["train"]
    tokenizer = Tokenizer(train_tokenizer(captions_of(source), 60), 8)
    inputs = TowerInputs(Pixels(config), tokenizer)
    return TrainTransform(source, inputs, replace(config, threads=threads), bad)


def take(
    transform: TrainTransform, steps: int, start: int = 0, process: int = 0, processes: int = 1
) -> list[Batch]:
    batches = train_batches(transform, 12, 0, start, (process,), processes)
    return [next(batches) for _ in range(steps)]


def assert_same(one: Batch, other: Batch) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_parts_are_the_batch_in_order(pairs: Path) -> None:
    """Also where two processes read a half of each part."""
    transform = transform_for(pairs)
    whole = take(transform, 3, start=1)
    for processes in (1, 2):
        by_process = [
            train_batches(transform, 12, 0, 1, (process,), processes, parts=3)
            for process in range(processes)
        ]
        for expected in whole:
            parts = [next(batches) for batches in by_process]
            joined = jax.tree.map(lambda *x: np.concatenate(x, axis=1), *parts)
            assert joined.image.shape[:2] == (3, 4)
            assert_same(jax.tree.map(lambda x: x.reshape(12, *x.shape[2:]), joined), expected)


def test_a_second_view_is_of_the_same_example(pairs: Path) -> None:
    transform = transform_for(pairs)
    transform.second = True
    (batch,) = take(transform, 1)
    assert batch.second is not None
    assert batch.second.image.shape == batch.image.shape
    assert not np.array_equal(batch.second.image, batch.image)
    first = transform.source[int(batch.index[0])]
    captions = [transform.inputs.text([text])[0][0] for text in first.captions]
    for tokens in (batch.tokens[0], batch.second.tokens[0]):
        assert any(np.array_equal(tokens, caption) for caption in captions)


def test_batches_do_not_depend_on_threads(pairs: Path) -> None:
    for one, other in zip(
        take(transform_for(pairs), 6), take(transform_for(pairs, threads=2), 6), strict=True
    ):
        assert_same(one, other)


def test_batches_do_not_depend_on_processes_that_decode(pairs: Path) -> None:
    transform = transform_for(pairs)
    alone = take(transform, 5)
    workers = transform_for(pairs, threads=1)
    workers.config = replace(workers.config, workers=2)
    for one, other in zip(alone, take(workers, 5), strict=True):
        assert_same(one, other)


def test_position_is_a_function_of_the_step(pairs: Path) -> None:
    transform = transform_for(pairs)
    for one, other in zip(take(transform, 8)[5:], take(transform, 3, start=5), strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_read_parts_of_the_same_batches(pairs: Path, processes: int) -> None:
    transform = transform_for(pairs)
    whole = take(transform, 5, start=2)
    parts = [take(transform, 5, 2, process, processes) for process in range(processes)]
    for step, batch in enumerate(whole):
        rows = [part[step] for part in parts]
        assert_same(batch, jax.tree.map(lambda *values: np.concatenate(values), *rows))


def test_every_epoch_holds_each_example_once_in_another_order(pairs: Path) -> None:
    transform = transform_for(pairs)
    per_epoch = len(transform.source) // 12
    epochs = [
        np.concatenate([batch.index for batch in take(transform, per_epoch, epoch * per_epoch)])
        for epoch in range(2)
    ]
    assert all(len(set(epoch)) == per_epoch * 12 for epoch in epochs)
    assert not np.array_equal(*epochs)


def test_a_broken_image_keeps_its_slot(pairs: Path) -> None:
    transform = transform_for(pairs)
    whole = take(transform, 3)
    chosen = int(whole[1].index[5])
    bad = BadExamples()
    broken = BrokenAt(transform.source, chosen)
    damaged = TrainTransform(broken, transform.inputs, transform.config, bad)
    for good, other in zip(whole, take(damaged, 3), strict=True):
        np.testing.assert_array_equal(good.index, other.index)
        np.testing.assert_array_equal(other.valid, other.index != chosen)
        np.testing.assert_array_equal(good.image[other.valid], other.image[other.valid])
    assert len(bad) == 1


class BrokenAt:
    """A source with one broken image."""

    def __init__(self, source: Source, index: int) -> None:
        self.source, self.index = source, index

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        example = self.source[index]
        return replace(example, image=example.image[:50]) if index == self.index else example

    def metadata(self, index: int) -> Example:
        return self.source.metadata(index)


def test_a_batch_larger_than_the_data_is_refused(pairs: Path) -> None:
    with pytest.raises(DataError, match="batch_size=500 is more than the"):
        train_batches(transform_for(pairs), 500, 0, 0)


def test_fingerprint_sees_captions_and_order(pairs: Path) -> None:
    sources = build_sources(DataConfig(source=str(pairs)), BadExamples())
    for split in ("train", "test"):
        again = build_sources(DataConfig(source=str(pairs)), BadExamples())
        assert fingerprint(sources) == fingerprint(again)
        again[split] = again[split].chosen(np.arange(len(again[split]))[::-1])
        assert fingerprint(sources) != fingerprint(again)
    other = pairs.with_name("other.csv")
    other.write_text(pairs.read_text().replace("a red ring", "a red hoop"))
    again = build_sources(DataConfig(source=str(other)), BadExamples())
    assert fingerprint(sources) != fingerprint(again)


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("size", [40, 96, 300])
def test_bilinear_crops_look_like_antialiased_ones(format: str, size: int) -> None:
    opened = Opened(encoded(photograph(640, 480), format))
    config = AugmentConfig(crop_scale=(0.3, 0.9))
    for seed in range(4):
        (plain, flipped), (fast, also) = (
            image_ops.augment(
                opened,
                size,
                replace(config, resampling=resampling),
                np.random.default_rng(seed),
            )
            for resampling in ("antialiased", "bilinear")
        )
        assert fast.shape == (size, size, 3)
        assert fast.dtype == np.uint8
        assert flipped == also
        assert np.abs(plain.astype(int) - fast).mean() < 3


def test_bilinear_crops_of_the_smallest_pictures() -> None:
    config = AugmentConfig(resampling="bilinear")
    for width, height in [(1, 1), (1, 300), (300, 1), (2, 2)]:
        opened = Opened.of(Image.new("RGB", (width, height), "teal"))
        rng = np.random.default_rng(0)
        for _ in range(200):
            assert np.all(image_ops.augment(opened, 8, config, rng)[0] == (0, 128, 128))


def test_bilinear_needs_opencv(monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(augment=AugmentConfig(resampling="bilinear"))
    source = build_sources(DataConfig(), BadExamples())["train"]
    tokenizer = Tokenizer(train_tokenizer(captions_of(source), 300), 8)
    inputs = TowerInputs(Pixels(config), tokenizer)
    TrainTransform(source, inputs, config, BadExamples())
    monkeypatch.setattr(image_ops, "cv2", None)
    TrainTransform(source, inputs, DataConfig(), BadExamples())
    with pytest.raises(ConfigError, match=r"resampling='bilinear' needs OpenCV: pip install"):
        TrainTransform(source, inputs, config, BadExamples())
