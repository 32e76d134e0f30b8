"""Key recovery: the secret key of an encryption, from what was handed on of its decryptions."""
