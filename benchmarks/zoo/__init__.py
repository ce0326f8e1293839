"""Coverage of the matcher over every model class of transformers that builds from a small random configuration."""
