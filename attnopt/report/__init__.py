"""What attnopt found and did, told: on the terminal, as JSON, as one self-contained page."""
