# Of ninja's lines, [3/40] Building ..., the count alone, each in the place of the one before.
/^ *\[[0-9]+\/[0-9]+\]/ { printf "\rcompiling pymtl %s ", $1; fflush(); counted = 1 }
END { if (counted) print "" }
