"""Part of compax."""
