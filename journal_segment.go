package main

// journal_segment.go owns the format of the journal's files: a header, then framed records, each checked on its own
// and tied to its place in its file. What the records say is journal_record.go's affair.

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

const (
	// The first 32 bytes of a segment keep their layout in every version, so that an older program can refuse it.
	segmentVersion = 1
	segmentMagic   = "job_item"
	segmentSuffix  = ".journal"

	// The header stands there twice: without its salt no record of the file could be read.
	segmentCopyBytes   = 32
	segmentHeaderBytes = 2 * segmentCopyBytes

	// A frame is marker, length of the payload, CRC of the payload, CRC of salt, offset and the three before.
	frameMarker      = "\xf1jI\x9e"
	frameHeaderBytes = 16
	maxPayloadBytes  = 17 << 20 // 16 MiB of task data and what goes with it

	scanWindowBytes = 256 << 10

	// fillAheadBytes is how far ahead of its records a segment is filled with zeros: a sync that need not make a file
	// longer is spared its inode, which on most file systems is half of what it costs.
	fillAheadBytes = 64 << 10
)

var (
	castagnoli = crc32.MakeTable(crc32.Castagnoli)

	errSegmentVersion = errors.New("written by a newer version of job_item")
	errSegmentHeader  = errors.New("damaged header")
	errRecordDamaged  = errors.New("damaged record")
)

// A journalFile is a segment that is open.
type journalFile interface {
	io.ReaderAt
	io.WriterAt
	Truncate(size int64) error
	Sync() error
	Close() error
}

// A segment is one file of the journal.
type segment struct {
	number  uint64
	path    string
	salt    uint64      // random, so that no task data can pass for a record
	file    journalFile // nil once it is complete and synced
	size    int64       // end of the last whole record
	filled  int64       // from size to here the file holds zeros; no more than size: it ends there
	live    int         // tasks whose data lies here
	dirty   bool        // written since the last sync
	suspect bool        // a sync failed: what was written since the one before may be lost
}

// A recordPlace is where a record lies.
type recordPlace struct {
	segment *segment
	offset  int64
	length  uint32 // of the payload
}

func (p recordPlace) bytes() int64 { return frameHeaderBytes + int64(p.length) }

func segmentPath(dir string, number uint64) string {
	return filepath.Join(dir, fmt.Sprintf("%010d%s", number, segmentSuffix))
}

// segmentNumber is the number in a segment's file name.
func segmentNumber(name string) (uint64, bool) {
	digits, ok := strings.CutSuffix(name, segmentSuffix)
	if !ok || len(digits) < 10 {
		return 0, false
	}
	number, err := strconv.ParseUint(digits, 10, 63)
	return number, err == nil
}

// createSegment makes an empty segment. Neither it nor its name is durable yet.
func createSegment(dir string, number uint64) (*segment, error) {
	s := &segment{number: number, path: segmentPath(dir, number), size: segmentHeaderBytes}
	var salt [8]byte
	rand.Read(salt[:]) // never fails
	s.salt = binary.LittleEndian.Uint64(salt[:])

	f, err := os.OpenFile(s.path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	if _, err := f.WriteAt(segmentHeader(s.salt), 0); err != nil {
		f.Close()
		os.Remove(s.path)
		return nil, err
	}
	s.file = dataSyncedFile{f}
	return s, nil
}

// write puts a frame behind the last record. After an error nothing has been written, as far as a reader can tell.
func (s *segment) write(frame []byte) (recordPlace, error) {
	placeFrame(frame, s.salt, s.size)
	end := s.size + int64(len(frame))
	if end <= s.filled || !s.fillAhead(frame) {
		if _, err := s.file.WriteAt(frame, s.size); err != nil {
			// What was written of the record is no record. Should it stay, the next one overwrites it, or opening cuts it off.
			_ = s.file.Truncate(s.size)
			s.filled = s.size
			return recordPlace{}, err
		}
	}
	place := recordPlace{s, s.size, uint32(len(frame) - frameHeaderBytes)}
	s.size = end
	return place, nil
}

// fillAhead writes a frame with zeros after it; false if they have no room.
func (s *segment) fillAhead(frame []byte) bool {
	end := s.size + int64(len(frame))
	zeros := fillAheadBytes - end%fillAheadBytes
	if _, err := s.file.WriteAt(append(frame, make([]byte, zeros)...), s.size); err != nil {
		return false
	}
	s.filled = end + zeros
	return true
}

// trim cuts off the zeros of a segment that is complete. Where that fails, they stay.
func (s *segment) trim() {
	if s.filled > s.size && s.file.Truncate(s.size) == nil {
		s.filled = s.size
	}
}

// onlyZeros reports whether a file holds nothing else from an offset on.
func onlyZeros(r io.ReaderAt, offset, size int64) (bool, error) {
	window := make([]byte, min(scanWindowBytes, max(0, size-offset)))
	for offset < size {
		window = window[:min(int64(len(window)), size-offset)]
		if n, err := r.ReadAt(window, offset); n < len(window) {
			return false, err
		}
		if len(bytes.Trim(window, "\x00")) > 0 {
			return false, nil
		}
		offset += int64(len(window))
	}
	return true, nil
}

func segmentHeader(salt uint64) []byte {
	half := make([]byte, 0, segmentHeaderBytes)
	half = append(half, segmentMagic...)
	half = binary.LittleEndian.AppendUint32(half, segmentVersion)
	half = binary.LittleEndian.AppendUint64(half, salt)
	half = append(half, make([]byte, segmentCopyBytes-4-len(half))...)
	half = binary.LittleEndian.AppendUint32(half, crc32.Checksum(half, castagnoli))
	return append(half, half...)
}

// readSegmentHeader gives the salt, errSegmentVersion, or errSegmentHeader when neither copy is whole.
func readSegmentHeader(r io.ReaderAt) (salt uint64, err error) {
	var header [segmentHeaderBytes]byte
	if n, err := r.ReadAt(header[:], 0); err != nil && !(n < len(header) && errors.Is(err, io.EOF)) {
		return 0, err
	}
	for half := header[:]; len(half) > 0; half = half[segmentCopyBytes:] {
		sum := binary.LittleEndian.Uint32(half[segmentCopyBytes-4:])
		if string(half[:8]) != segmentMagic || crc32.Checksum(half[:segmentCopyBytes-4], castagnoli) != sum {
			continue
		}
		if v := binary.LittleEndian.Uint32(half[8:]); v > segmentVersion {
			return 0, fmt.Errorf("%w: format %d, this one knows %d", errSegmentVersion, v, segmentVersion)
		}
		return binary.LittleEndian.Uint64(half[12:]), nil
	}
	return 0, errSegmentHeader
}

// sealFrame fills in the frame header that stands in front of a payload, but for the part that place adds.
func sealFrame(frame []byte) []byte {
	copy(frame, frameMarker)
	binary.LittleEndian.PutUint32(frame[4:], uint32(len(frame)-frameHeaderBytes))
	binary.LittleEndian.PutUint32(frame[8:], crc32.Checksum(frame[frameHeaderBytes:], castagnoli))
	return frame
}

// placeFrame ties a sealed frame to its place.
func placeFrame(frame []byte, salt uint64, offset int64) {
	binary.LittleEndian.PutUint32(frame[12:], frameHeaderSum(frame, salt, offset))
}

func frameHeaderSum(header []byte, salt uint64, offset int64) uint32 {
	var place [16]byte
	binary.LittleEndian.PutUint64(place[:], salt)
	binary.LittleEndian.PutUint64(place[8:], uint64(offset))
	return crc32.Update(crc32.Checksum(place[:], castagnoli), castagnoli, header[:12])
}

// parseFrameHeader gives the length and CRC of the payload that follows; ok means that it was written right here.
func parseFrameHeader(header []byte, salt uint64, offset int64) (length int, sum uint32, ok bool) {
	if string(header[:4]) != frameMarker ||
		binary.LittleEndian.Uint32(header[12:]) != frameHeaderSum(header, salt, offset) {
		return 0, 0, false
	}
	n := binary.LittleEndian.Uint32(header[4:])
	return int(n), binary.LittleEndian.Uint32(header[8:]), n > 0 && n <= maxPayloadBytes
}

// readRecord reads one record back and checks it. file is its segment, nil if that is not open.
func readRecord(place recordPlace, file journalFile) (payload []byte, err error) {
	frame := make([]byte, place.bytes())
	err = os.ErrClosed
	if file != nil {
		_, err = file.ReadAt(frame, place.offset)
	}
	if errors.Is(err, os.ErrClosed) { // perhaps meanwhile, as it is complete
		var f *os.File
		if f, err = os.Open(place.segment.path); err != nil {
			return nil, err
		}
		defer f.Close()
		_, err = f.ReadAt(frame, place.offset)
	}
	if err != nil {
		return nil, err
	}
	length, sum, ok := parseFrameHeader(frame, place.segment.salt, place.offset)
	payload = frame[frameHeaderBytes:]
	if !ok || length != len(payload) || crc32.Checksum(payload, castagnoli) != sum {
		return nil, errRecordDamaged
	}
	return payload, nil
}

// A segmentScanner reads the records of a segment in order and steps over what is damaged, in memory bounded by the
// longest record.
type segmentScanner struct {
	r       io.ReaderAt
	salt    uint64
	size    int64 // of the file
	offset  int64 // where the next record is looked for
	good    int64 // end of the last whole record
	damaged int64 // bytes stepped over before good
	err     error // of reading

	window []byte // what was read ahead, from windowStart
	start  int64
}

func newSegmentScanner(r io.ReaderAt, salt uint64, size int64) *segmentScanner {
	return &segmentScanner{r: r, salt: salt, size: size, offset: segmentHeaderBytes, good: min(segmentHeaderBytes, size)}
}

// next gives the next whole record; its payload is valid until the next call. ok is false at the end, or at an error.
func (s *segmentScanner) next() (offset int64, payload []byte, ok bool) {
	for s.offset+frameHeaderBytes <= s.size {
		header := s.peek(s.offset, frameHeaderBytes)
		if s.err != nil {
			return 0, nil, false
		}
		length, sum, ok := parseFrameHeader(header, s.salt, s.offset)
		if !ok {
			s.offset = s.resync(s.offset + 1)
			continue
		}
		end := s.offset + frameHeaderBytes + int64(length)
		if end > s.size {
			return 0, nil, false // torn
		}
		payload := s.peek(s.offset+frameHeaderBytes, length)
		if s.err != nil {
			return 0, nil, false
		}
		offset := s.offset
		s.offset = end // the header is whole, so its length can be trusted even where the payload is damaged
		if crc32.Checksum(payload, castagnoli) == sum {
			s.damaged += offset - s.good
			s.good = end
			return offset, payload, true
		}
	}
	return 0, nil, false
}

// resync gives the offset of the next frame header from there on, the end of the file if there is none.
func (s *segmentScanner) resync(from int64) int64 {
	for from+frameHeaderBytes <= s.size {
		if s.peek(from, frameHeaderBytes); s.err != nil {
			return s.size
		}
		ahead := s.window[from-s.start:]
		at := bytes.Index(ahead, []byte(frameMarker))
		if at < 0 {
			from += int64(len(ahead) - len(frameMarker) + 1)
			continue
		}
		from += int64(at)
		if from+frameHeaderBytes > s.size {
			break
		}
		header := s.peek(from, frameHeaderBytes)
		if s.err != nil {
			return s.size
		}
		if _, _, ok := parseFrameHeader(header, s.salt, from); ok {
			return from
		}
		from++
	}
	return s.size
}

// peek gives n bytes of the file, which must be there.
func (s *segmentScanner) peek(offset int64, n int) []byte {
	if offset < s.start || offset+int64(n) > s.start+int64(len(s.window)) {
		want := int(min(int64(max(n, scanWindowBytes)), s.size-offset))
		if cap(s.window) < want {
			s.window = make([]byte, want)
		}
		s.window, s.start = s.window[:want], offset
		if got, err := s.r.ReadAt(s.window, offset); got < want {
			s.window, s.err = s.window[:0], err
			return nil
		}
	}
	return s.window[offset-s.start:][:n]
}
