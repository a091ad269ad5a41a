"""One script per claim; each prints one JSON object per line."""
