"""Everything that makes and trains a policy: initial model, verl's configuration, supervision, export."""
