"""Hidden states, output head, labels and the teacher's side of a batch in; loss and both gradients out."""
