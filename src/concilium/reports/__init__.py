"""What a person looks at after a run, made from `results.json`. One file here: one view."""
