"""Networks and split batch normalisation; nothing here knows of files, folders or flags."""
