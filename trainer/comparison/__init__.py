"""Finished models, texts and tasks in; what each learnt and what it kept, as table, JSON, picture and page, out."""
