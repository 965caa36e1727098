package cni

import "context"

func (p *Plugin) check(ctx context.Context, c *call) error { return nil }
