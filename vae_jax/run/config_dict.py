"""The config that a config file returns; it shows the fields that are not defaults."""

from ml_collections import ConfigDict

from vae_jax.run.config import differing


class Config(ConfigDict):
    """A ConfigDict whose `repr` lists the fields that differ from the defaults in one line; `str` shows all fields."""

    def __repr__(self):
        fields = self.to_dict()
        if not isinstance(fields.get("model"), dict):  # a section
            return str(self)
        changed = ", ".join(f"{name}={value!r}" for name, value in differing(fields).items())
        return f"<config of {fields['model'].get('name')}: {changed}; other fields have their defaults>"
