"""The accuracy lab: what FP8 attention loses, by recipe and by what it is given."""
