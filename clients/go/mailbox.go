package millrace

import "sync"

// mailbox hands on what one part of the client has for another, without a limit; it has one reader.
type mailbox[T any] struct {
	mu    sync.Mutex
	wake  sync.Cond
	items []T
	err   error
}

func newMailbox[T any]() *mailbox[T] {
	m := &mailbox[T]{}
	m.wake.L = &m.mu
	return m
}

// put adds an item; nothing is added to a mailbox that has ended.
func (m *mailbox[T]) put(item T) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err == nil {
		m.items = append(m.items, item)
		m.wake.Signal()
	}
}

// end lets its reader have what was put, and then this error; only the first end counts.
func (m *mailbox[T]) end(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err == nil {
		m.err = err
		m.wake.Signal()
	}
}

// take waits for all that was put, in order, or for the end.
func (m *mailbox[T]) take() ([]T, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for len(m.items) == 0 && m.err == nil {
		m.wake.Wait()
	}
	if len(m.items) == 0 {
		return nil, m.err
	}
	items := m.items
	m.items = nil
	return items, nil
}
