package nft

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// bufferBytes is asked for in both directions: a batch is one datagram, a default socket refuses 200 KiB.
const bufferBytes = 64 << 20

// conn is one netlink socket to nf_tables, used by one goroutine. nf_tables works inside the system call that
// sends, so answers are there when it returns.
type conn struct {
	file *os.File
	fd   int
	port uint32
	seq  uint32
	buf  []byte
}

// dial opens a socket in the network namespace ns, 0 being the caller's.
func dial(ns int) (*conn, error) {
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: ns})
	if err != nil {
		return nil, fmt.Errorf("dial nfnetlink: %w", err)
	}
	defer c.Close()
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("dial nfnetlink: %w", err)
	}
	fd, dupErr := -1, error(nil)
	if err := raw.Control(func(s uintptr) { fd, dupErr = unix.FcntlInt(s, unix.F_DUPFD_CLOEXEC, 3) }); err != nil {
		return nil, fmt.Errorf("dial nfnetlink: %w", err)
	}
	if dupErr != nil {
		return nil, fmt.Errorf("duplicate nfnetlink socket: %w", dupErr)
	}
	return newConn(fd)
}

// adopt takes over a socket that somebody else opened, by a duplicate.
func adopt(f *os.File) (*conn, error) {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, fmt.Errorf("duplicate nfnetlink socket: %w", err)
	}
	return newConn(fd)
}

func newConn(fd int) (*conn, error) {
	c := &conn{file: os.NewFile(uintptr(fd), "nfnetlink"), fd: fd, seq: 1, buf: make([]byte, 1<<17)}
	name, err := unix.Getsockname(fd)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("name of nfnetlink socket: %w", err), c.Close())
	}
	nl, ok := name.(*unix.SockaddrNetlink)
	if !ok {
		return nil, errors.Join(errors.New("the socket handed over is not a netlink socket"), c.Close())
	}
	c.port = nl.Pid
	for _, o := range []struct{ force, plain int }{{unix.SO_SNDBUFFORCE, unix.SO_SNDBUF}, {unix.SO_RCVBUFFORCE, unix.SO_RCVBUF}} {
		// In a user namespace only the plain option is allowed, up to the host's limit.
		if unix.SetsockoptInt(fd, unix.SOL_SOCKET, o.force, bufferBytes) != nil {
			_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, o.plain, bufferBytes)
		}
	}
	for _, o := range []int{unix.NETLINK_EXT_ACK, unix.NETLINK_CAP_ACK} {
		if err := unix.SetsockoptInt(fd, unix.SOL_NETLINK, o, 1); err != nil {
			return nil, errors.Join(fmt.Errorf("set netlink option %d: %w", o, err), c.Close())
		}
	}
	return c, nil
}

func (c *conn) Close() error {
	if err := c.file.Close(); err != nil {
		return fmt.Errorf("close nfnetlink socket: %w", err)
	}
	return nil
}

// commit sends a transaction and waits for the kernel's answer: all of it is in force, or nothing is.
func (c *conn) commit(b *batch) error {
	data := b.bytes()
	first := c.seq
	c.seq = b.seq
	c.drain()
	if err := unix.Sendto(c.fd, data, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		if errors.Is(err, unix.EMSGSIZE) {
			return fmt.Errorf("send transaction of %d bytes: run as root, or raise net.core.wmem_max: %w", len(data), err)
		}
		return fmt.Errorf("send transaction of %d bytes: %w", len(data), err)
	}
	acked := false
	var failed error
	for {
		n, _, err := unix.Recvfrom(c.fd, c.buf, unix.MSG_DONTWAIT)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN) && failed != nil:
			return failed
		case errors.Is(err, unix.EAGAIN) && acked:
			return nil
		case err != nil:
			return fmt.Errorf("transaction without acknowledgement: %w", err)
		}
		ok, err := b.answers(c.buf[:n], first)
		acked = acked || ok
		if failed == nil {
			failed = err
		}
	}
}

// drain forgets answers to requests that were given up.
func (c *conn) drain() {
	for {
		if _, _, err := unix.Recvfrom(c.fd, c.buf, unix.MSG_DONTWAIT); err != nil && !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

// answers reads a datagram of acknowledgements; the first error names what failed.
func (b *batch) answers(data []byte, first uint32) (acked bool, err error) {
	for len(data) >= unix.NLMSG_HDRLEN {
		n := int(binary.NativeEndian.Uint32(data))
		if n < unix.NLMSG_HDRLEN || n > len(data) {
			return acked, errors.New("answer of nf_tables is cut short")
		}
		m := data[:n]
		data = data[min((n+3)&^3, len(data)):]
		seq := binary.NativeEndian.Uint32(m[8:])
		if binary.NativeEndian.Uint16(m[4:]) != unix.NLMSG_ERROR || seq < first || len(m) < 36 {
			continue
		}
		code := -int32(binary.NativeEndian.Uint32(m[16:]))
		if code == 0 {
			acked = true
		} else if err == nil {
			err = fmt.Errorf("%s: %w", b.what(seq, errorOffset(m)), unix.Errno(code))
		}
	}
	return acked, err
}

// errorOffset is where in the message the kernel saw the fault (NLMSGERR_ATTR_OFFS), 0 if it does not say.
func errorOffset(m []byte) int {
	const header = unix.NLMSG_HDRLEN + 4 + unix.NLMSG_HDRLEN // ours, the error code, the offender's
	d, err := netlink.NewAttributeDecoder(m[header:])
	if err != nil {
		return 0
	}
	for d.Next() {
		if d.Type() == unix.NLMSGERR_ATTR_OFFS {
			return int(d.Uint32())
		}
	}
	return 0
}

// what says what the bytes at offset of message seq do.
func (b *batch) what(seq uint32, offset int) string {
	parts := b.ops[seq]
	does := fmt.Sprintf("message %d", seq)
	for _, p := range parts {
		if p.offset > offset {
			break
		}
		does = p.String()
	}
	return does
}

// Execute sends one request and collects its answers, dumps included.
func (c *conn) Execute(m netlink.Message) ([]netlink.Message, error) {
	for range 16 { // a dump that a commit interrupted starts again
		out, again, err := c.once(m)
		if !again {
			return out, err
		}
	}
	return nil, errors.New("the table changed during every one of 16 attempts to read it")
}

func (c *conn) once(m netlink.Message) (out []netlink.Message, again bool, err error) {
	c.drain()
	c.seq++
	dump := m.Header.Flags&netlink.Dump == netlink.Dump
	if !dump {
		m.Header.Flags |= netlink.Acknowledge
	}
	m.Header.Sequence, m.Header.Length = c.seq, uint32(unix.NLMSG_HDRLEN+len(m.Data))
	data, err := m.MarshalBinary()
	if err != nil {
		return nil, false, fmt.Errorf("encode request: %w", err)
	}
	if err := unix.Sendto(c.fd, data, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, false, fmt.Errorf("send request: %w", err)
	}
	for {
		n, _, err := unix.Recvfrom(c.fd, c.buf, unix.MSG_DONTWAIT)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, false, fmt.Errorf("receive answer: %w", err)
		}
		done, err := collect(c.buf[:n], c.seq, &out, &again)
		if done || err != nil {
			return out, again && err == nil, err
		}
	}
}

// collect appends the messages of one datagram. done: the answer is complete.
func collect(data []byte, seq uint32, out *[]netlink.Message, again *bool) (done bool, err error) {
	for len(data) >= unix.NLMSG_HDRLEN {
		n := int(binary.NativeEndian.Uint32(data))
		if n < unix.NLMSG_HDRLEN || n > len(data) {
			return true, errors.New("answer of nf_tables is cut short")
		}
		m := data[:n]
		data = data[min((n+3)&^3, len(data)):]
		h := netlink.Header{Type: netlink.HeaderType(binary.NativeEndian.Uint16(m[4:])), Flags: netlink.HeaderFlags(binary.NativeEndian.Uint16(m[6:])),
			Sequence: binary.NativeEndian.Uint32(m[8:])}
		if h.Sequence != seq {
			continue
		}
		*again = *again || h.Flags&unix.NLM_F_DUMP_INTR != 0
		switch h.Type {
		case netlink.Done, netlink.Error:
			if len(m) >= unix.NLMSG_HDRLEN+4 {
				if code := -int32(binary.NativeEndian.Uint32(m[16:])); code != 0 {
					return true, unix.Errno(code)
				}
			}
			return true, nil
		}
		*out = append(*out, netlink.Message{Header: h, Data: append([]byte(nil), m[unix.NLMSG_HDRLEN:]...)})
	}
	return false, nil
}

// generation reads the number of the last commit in the namespace.
func (c *conn) generation(context.Context) (uint32, error) {
	m, err := nfnetlinkRequest(unix.NFT_MSG_GETGEN, 0, netlink.NewAttributeEncoder())
	if err != nil {
		return 0, fmt.Errorf("encode: %w", err)
	}
	replies, err := c.Execute(m)
	if err != nil {
		return 0, fmt.Errorf("read generation: %w", err)
	}
	for _, r := range replies {
		if len(r.Data) < 4 {
			continue
		}
		d, err := netlink.NewAttributeDecoder(r.Data[4:])
		if err != nil {
			return 0, fmt.Errorf("decode generation: %w", err)
		}
		d.ByteOrder = binary.BigEndian
		for d.Next() {
			if d.Type() == unix.NFTA_GEN_ID {
				return d.Uint32(), nil
			}
		}
	}
	return 0, errors.New("read generation: the kernel's answer has none")
}
