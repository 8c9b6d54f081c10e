"""Results for people and for programs: terminal tables and JSON documents. No maths."""
