"""Records, their token sequences, clean / corrupted pairs, and the embedded fictitious world."""
