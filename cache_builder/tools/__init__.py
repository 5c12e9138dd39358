"""What else one does with caches: estimate, verify, merge, export, share."""
