"""The networks; each file is complete in itself."""
