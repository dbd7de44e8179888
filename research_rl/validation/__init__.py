"""Data quality: what is measured, which limits hold, and the stage that refuses data. Alone in importing Great Expectations."""
