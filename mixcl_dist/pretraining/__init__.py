"""Patches → two views → features → three consistencies → step."""
