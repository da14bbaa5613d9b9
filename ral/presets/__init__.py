"""Settings by name for `python -m ral COMMAND --preset NAME`: one YAML file each."""
