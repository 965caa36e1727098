package nft

// AssumeExact takes away one of Apply's waits for grace periods, the one between changes of one key, as on Linux 6.17
// and newer.
func (t *Table) AssumeExact() { t.replaces = true }
