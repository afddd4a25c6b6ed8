"""The parts that networks are made of: attention patterns and their kernels, embeddings, layers."""
