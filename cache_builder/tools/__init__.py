"""What else one does with caches: caches or a corpus in; an estimate, a check, a joined cache or an export out."""
