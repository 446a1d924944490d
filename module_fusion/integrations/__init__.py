"""What is made for one other library each; none of them is imported before it is needed."""
