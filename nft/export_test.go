package nft

// AssumeExact takes away Apply's waiting for grace periods between changes of one key, as on Linux 6.17 and newer.
func (t *Table) AssumeExact() { t.replaces = true }
