"""Models with their gains and losses in; which of them to take, by each rule, and which are as good, out."""
