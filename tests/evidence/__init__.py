"""Evidence on real tasks: ``python -m tests.evidence`` trains, compresses, scores and tells."""
