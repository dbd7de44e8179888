"""What the duels are held against, where no package of it exists: published patterns in our own words."""
