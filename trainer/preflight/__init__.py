"""Settings and a built trainer in, one-line refusals out: what would fail or mislead later fails here."""
