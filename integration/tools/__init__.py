"""Commands and what they need; no engine imports anything of this folder."""
