"""Drawing samples: seeds, samplers by name, resumable jobs, the files they write."""
