"""Model servers behind one interface: launch commands, a guarded service, and an engine that sends it token ids."""
