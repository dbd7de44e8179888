"""What runs in the policy environment's interpreter, inside verl, vLLM or Ray. Alone in importing them."""
