"""Networks as files for other programs; `python -m mtseg.export` is the command."""
