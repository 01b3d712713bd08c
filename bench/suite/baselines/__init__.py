"""What a μMoE layer is held against, and the second computation by which each is checked."""
