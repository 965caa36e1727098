package ipam

import (
	"context"
)

// Release ends the leases of o and returns them; an owner without leases is no error.
// Without a lease file there is nothing to do, and none is made.
func (s *Store) Release(ctx context.Context, o Owner) ([]Lease, error) {
	if !s.Exists() {
		return nil, nil
	}
	var gone []Lease
	err := s.update(ctx, func(t *tables) error {
		var err error
		gone, err = t.drop(o, s.o.Now())
		return err
	})
	return gone, err
}

// ReleaseIf ends every owner's leases of which dead says yes for one, and returns them.
func (s *Store) ReleaseIf(ctx context.Context, dead func(Lease) bool) ([]Lease, error) {
	if !s.Exists() {
		return nil, nil
	}
	var gone []Lease
	err := s.update(ctx, func(t *tables) error {
		gone = nil
		all, err := t.all()
		if err != nil {
			return err
		}
		for _, l := range all {
			if !dead(l) {
				continue
			}
			dropped, err := t.drop(l.Owner, s.o.Now())
			if err != nil {
				return err
			}
			gone = append(gone, dropped...)
		}
		return nil
	})
	return gone, err
}

// Reclaim ends the leases from before a reboot whose network namespace is gone. Acquire
// does so by itself when a pool is full.
func (s *Store) Reclaim(ctx context.Context) error {
	if !s.Exists() {
		return nil
	}
	return s.update(ctx, func(t *tables) error {
		_, err := s.reclaim(t, s.o.Now())
		return err
	})
}

// Leases returns all leases, in the order of their addresses within each family.
func (s *Store) Leases(ctx context.Context) ([]Lease, error) {
	if !s.Exists() {
		return nil, nil
	}
	var list []Lease
	err := s.update(ctx, func(t *tables) error {
		var err error
		list, err = t.all()
		return err
	})
	return list, err
}

// Of returns the leases of o in the order they were taken.
func (s *Store) Of(ctx context.Context, o Owner) ([]Lease, error) {
	if !s.Exists() {
		return nil, nil
	}
	var list []Lease
	err := s.update(ctx, func(t *tables) error {
		var err error
		list, err = t.of(o)
		return err
	})
	return list, err
}
