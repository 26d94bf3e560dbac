"""Adapters that plug the metadata into serving engines: one module an engine, none imported unless asked for."""
