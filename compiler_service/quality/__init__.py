"""What quantizing cost: measured in every build, kept in the engine, held against limits."""
