"""Run configurations: one short file each, with ``get_config() -> Config``."""
