"""What a rank will need before there is one: weights, gradients, optimizer and activations, from the code itself."""
