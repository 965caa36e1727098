package debug

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/nftcni/nftcni/agent"
	"github.com/nftcni/nftcni/cni"
)

type captureFlags struct {
	count, seconds, snaplen int
}

func (s *session) captureCommand() *cobra.Command {
	var fl captureFlags
	cmd := &cobra.Command{
		Use:   "capture POD",
		Short: "Write the packets of a pod's interface to standard output as pcap",
		Long: "Write the packets of a pod's interface to standard output as pcap, for tcpdump or\n" +
			"wireshark, without tcpdump on the node. It sees what the pod sends before policy, and\n" +
			"what reaches the pod after policy.",
		Example: "  nftcni debug capture shop/web > web.pcap\n  nftcni debug capture shop/web | tcpdump -nr -\n" +
			"  ssh node nftcni debug capture shop/web --seconds 0 | wireshark -k -i -",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: s.completePods(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if f, ok := cmd.OutOrStdout().(*os.File); ok && term.IsTerminal(int(f.Fd())) {
				return fmt.Errorf("pcap is binary and standard output is a terminal: redirect it to a file or into tcpdump -nr -")
			}
			if fl.snaplen < 64 || fl.snaplen > maxSnap {
				return fmt.Errorf("flag --snaplen is %d: it takes 64 to %d", fl.snaplen, maxSnap)
			}
			link, err := s.podInterface(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			ctx, cancel := boundedContext(cmd.Context(), fl.seconds)
			defer cancel()
			n, err := capture(ctx, link, fl, cmd.OutOrStdout())
			noticeTo(cmd)(plural(n, "packet") + " of " + link)
			return err
		},
	}
	cmd.Flags().IntVar(&fl.count, "count", 10000, "end after this many packets; 0: none")
	cmd.Flags().IntVar(&fl.seconds, "seconds", 60, "end after this many seconds; 0: when interrupted")
	cmd.Flags().IntVar(&fl.snaplen, "snaplen", maxSnap, "keep this many bytes of each packet")
	return cmd
}

// maxSnap is the greatest packet that pcap readers accept.
const maxSnap = 262144

// podInterface is the host's end of a pod's interface: what the agent says, or the
// attachment that the plugin recorded.
func (s *session) podInterface(ctx context.Context, name string) (string, error) {
	var pods []agent.Pod
	err := s.get(ctx, agent.PathPods+"?local=1", &pods)
	if err != nil && !errors.Is(err, errNoAgent) {
		return "", err
	}
	var found []string
	for _, p := range pods {
		if p.Name.String() == name || p.Name.Name == name {
			found = append(found, p.Interfaces...)
		}
	}
	if err != nil {
		list, _ := cni.Attachments(s.runDir) // an unreadable one is not the one asked for
		for _, a := range list {
			if a.Namespace+"/"+a.Pod == name || a.Pod == name {
				found = append(found, a.HostInterface)
			}
		}
	}
	if len(found) == 0 {
		return "", fmt.Errorf("no pod of this node that is attached is called %q (nftcni debug pods lists them)", name)
	}
	return slices.Min(found), nil
}

// capture copies packets of a link until ctx ends or there are enough.
func capture(ctx context.Context, name string, fl captureFlags, to io.Writer) (n int, err error) {
	link, err := net.InterfaceByName(name)
	if err != nil {
		return 0, fmt.Errorf("interface %s: %w", name, err)
	}
	fd, err := packetSocket(link)
	if err != nil {
		return 0, err
	}
	defer func() { _ = unix.Close(fd) }()
	w := bufio.NewWriterSize(to, 1<<16)
	defer func() { err = errors.Join(err, w.Flush()) }()
	if _, err := w.Write(pcapHeader(fl.snaplen)); err != nil {
		return 0, err
	}
	if err := w.Flush(); err != nil { // a reader sees that the capture has begun
		return 0, err
	}
	buf := make([]byte, maxSnap)
	for ctx.Err() == nil && (fl.count == 0 || n < fl.count) {
		size, err := receive(fd, buf, w)
		if err != nil {
			return n, fmt.Errorf("receive from %s: %w", name, err)
		}
		if size == 0 {
			continue
		}
		if _, err := w.Write(pcapPacket(time.Now(), size, buf[:min(size, fl.snaplen, len(buf))])); err != nil {
			return n, err
		}
		n++
	}
	return n, nil
}

// packetSocket sees every packet of a link (packet(7)).
func packetSocket(link *net.Interface) (int, error) {
	all := binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, unix.ETH_P_ALL))
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(all))
	if errors.Is(err, unix.EPERM) {
		return -1, fmt.Errorf("open packet socket: run as root (CAP_NET_RAW): %w", err)
	}
	if err != nil {
		return -1, fmt.Errorf("open packet socket: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: link.Index}); err != nil {
		return -1, errors.Join(fmt.Errorf("bind packet socket to %s: %w", link.Name, err), unix.Close(fd))
	}
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20) // without it more packets are lost under load
	return fd, nil
}

// receive reads one packet; 0 means that none came within a tenth of a second, in which
// w is flushed so that a reader behind a pipe sees what there is.
func receive(fd int, buf []byte, w *bufio.Writer) (int, error) {
	size, _, err := unix.Recvfrom(fd, buf, unix.MSG_TRUNC)
	if err == nil {
		return size, nil
	}
	if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
		return 0, err
	}
	if err := w.Flush(); err != nil {
		return 0, err
	}
	_, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 100)
	if errors.Is(err, unix.EINTR) {
		err = nil
	}
	return 0, err
}

// pcapHeader is the file header of pcap(5) with nanoseconds, link type Ethernet.
func pcapHeader(snaplen int) []byte {
	b := binary.LittleEndian.AppendUint32(nil, 0xa1b23c4d)
	b = binary.LittleEndian.AppendUint16(b, 2)
	b = binary.LittleEndian.AppendUint16(b, 4)
	b = append(b, make([]byte, 8)...)
	b = binary.LittleEndian.AppendUint32(b, uint32(snaplen))
	return binary.LittleEndian.AppendUint32(b, 1)
}

func pcapPacket(at time.Time, size int, data []byte) []byte {
	b := binary.LittleEndian.AppendUint32(make([]byte, 0, 16+len(data)), uint32(at.Unix()))
	b = binary.LittleEndian.AppendUint32(b, uint32(at.Nanosecond()))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(data)))
	b = binary.LittleEndian.AppendUint32(b, uint32(size))
	return append(b, data...)
}
