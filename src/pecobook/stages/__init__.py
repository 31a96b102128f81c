"""The training stages. Each is an nn.Module whose forward returns a loss; stages never import each other."""
