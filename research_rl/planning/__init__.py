"""What a run will take and whether it fits: bytes, memory, time, and how its parameters differ from the paper's."""
