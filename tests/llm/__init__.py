"""What a desk asks language models, and what becomes of the answers; against a real server that answers by script."""
