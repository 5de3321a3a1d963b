"""What the training scripts share: leaves put together by their flags. Not to be copied alone; no leaf knows it."""
