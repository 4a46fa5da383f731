"""The journal behind one interface (`base`): `sqlite` on disk, `memory` for tests and throw-away agents."""
