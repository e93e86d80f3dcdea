//! Memory that I/O reads into and writes from: scatter lists and aligned buffers.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::cell::RefCell;
use std::marker::PhantomData;
use std::ptr::NonNull;
use std::rc::{Rc, Weak};

use libc::iovec;

/// Alignment of every [`AlignedBuf`]: enough for O_DIRECT on any device.
pub const BUF_ALIGN: usize = 4096;

/// A scatter list: `len` bytes found one after another in the memory of `segs`, of which the first
/// `skip` bytes are passed over. Cheap to copy and to cut; cutting moves no iovec.
///
/// The memory may be a guest's, which changes it at will, so it is never lent out as `&[u8]`.
#[derive(Clone, Copy, Debug)]
pub struct Sg<'a> {
    segs: &'a [iovec],
    skip: usize,
    len: usize,
    _memory: PhantomData<&'a [std::cell::Cell<u8>]>,
}

impl<'a> Sg<'a> {
    /// All of `segs`.
    ///
    /// # Safety
    /// Every iovec must name memory that is readable and writable (writable only where it is used as
    /// the target of a read) for `'a`, and that no Rust reference covers meanwhile.
    pub unsafe fn new(segs: &'a [iovec]) -> Self {
        Self {
            segs,
            skip: 0,
            len: segs.iter().map(|s| s.iov_len).sum(),
            _memory: PhantomData,
        }
    }

    /// An empty list.
    pub fn empty() -> Self {
        Self {
            segs: &[],
            skip: 0,
            len: 0,
            _memory: PhantomData,
        }
    }

    /// Bytes in the list.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True if there is not a byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The first `at` bytes, and the rest. `at` beyond the end gives everything and nothing.
    pub fn split_at(self, at: usize) -> (Self, Self) {
        let at = at.min(self.len);
        let head = Self { len: at, ..self };
        let mut tail = Self {
            len: self.len - at,
            skip: self.skip + at,
            ..self
        };
        while let Some(first) = tail.segs.first() {
            if tail.skip < first.iov_len {
                break;
            }
            tail.skip -= first.iov_len;
            tail.segs = &tail.segs[1..];
        }
        (head, tail)
    }

    /// `len` bytes from `offset` on, cut at the end.
    pub fn slice(self, offset: usize, len: usize) -> Self {
        self.split_at(offset).1.split_at(len).0
    }

    /// The pieces, as (address, bytes); none is empty.
    pub fn iter(self) -> impl Iterator<Item = (*mut u8, usize)> + 'a {
        let mut skip = self.skip;
        let mut left = self.len;
        self.segs
            .iter()
            .map_while(move |seg| {
                if left == 0 {
                    return None;
                }
                let start = skip.min(seg.iov_len);
                skip -= start;
                let len = (seg.iov_len - start).min(left);
                left -= len;
                Some((seg.iov_base.cast::<u8>().wrapping_add(start), len))
            })
            .filter(|piece| piece.1 > 0)
    }

    /// True if every piece starts and ends on a multiple of `align`, a power of two.
    pub fn is_aligned(self, align: usize) -> bool {
        self.iter()
            .all(|(ptr, len)| (ptr as usize | len) & (align - 1) == 0)
    }

    /// The iovecs themselves, if the list is exactly all of them.
    pub(super) fn whole(&self) -> Option<&'a [iovec]> {
        let all: usize = self.segs.iter().map(|s| s.iov_len).sum();
        (self.skip == 0 && self.len == all).then_some(self.segs)
    }

    /// Copies the list's bytes to the front of `to`; returns how many: the smaller of the two lengths.
    pub fn copy_to(self, to: &mut [u8]) -> usize {
        let mut done = 0;
        for (ptr, len) in self.iter() {
            let len = len.min(to.len() - done);
            // SAFETY: `new`'s caller vouches for the piece; `to` is a distinct Rust allocation of which
            // `done + len` bytes exist.
            unsafe { std::ptr::copy_nonoverlapping(ptr, to.as_mut_ptr().add(done), len) };
            done += len;
        }
        done
    }

    /// Copies `from` to the front of the list; returns how many bytes: the smaller of the two lengths.
    pub fn copy_from(self, from: &[u8]) -> usize {
        let mut done = 0;
        for (ptr, len) in self.iter() {
            let len = len.min(from.len() - done);
            // SAFETY: as in `copy_to`, the other way round.
            unsafe { std::ptr::copy_nonoverlapping(from.as_ptr().add(done), ptr, len) };
            done += len;
        }
        done
    }

    /// Fills the list with zeros.
    pub fn zero(self) {
        for (ptr, len) in self.iter() {
            // SAFETY: `new`'s caller vouches for the piece being writable.
            unsafe { std::ptr::write_bytes(ptr, 0, len) };
        }
    }
}

/// A buffer aligned to [`BUF_ALIGN`], from a reactor's pool ([`super::Io::buf`]) or of its own. Its
/// contents are not cleared between uses.
#[derive(Debug)]
pub struct AlignedBuf {
    ptr: NonNull<u8>,
    capacity: usize,
    len: usize,
    iov: [iovec; 1],
    pool: Weak<BufPool>,
}

impl AlignedBuf {
    /// A zeroed buffer that belongs to no pool.
    pub fn new(len: usize) -> Self {
        let capacity = capacity_for(len);
        Self::from_raw(allocate(capacity), capacity, len, Weak::new())
    }

    fn from_raw(ptr: NonNull<u8>, capacity: usize, len: usize, pool: Weak<BufPool>) -> Self {
        Self {
            ptr,
            capacity,
            len,
            iov: [iovec {
                iov_base: ptr.as_ptr().cast(),
                iov_len: len,
            }],
            pool,
        }
    }

    /// The whole buffer as a scatter list.
    pub fn sg(&mut self) -> Sg<'_> {
        // SAFETY: the allocation is ours, and `&mut self` keeps every other reference out for the list's
        // lifetime.
        unsafe { Sg::new(&self.iov) }
    }
}

impl std::ops::Deref for AlignedBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: `len` bytes are allocated and were zeroed when they were.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl std::ops::DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        match self.pool.upgrade() {
            Some(pool) => pool.put(self.ptr, self.capacity),
            // SAFETY: allocated by `allocate(self.capacity)`, and given back once.
            None => unsafe { dealloc(self.ptr.as_ptr(), layout(self.capacity)) },
        }
    }
}

/// Free buffers by size class (powers of two from 4 KiB), so that the steady state allocates nothing.
#[derive(Debug, Default)]
pub(super) struct BufPool {
    classes: RefCell<Vec<Vec<NonNull<u8>>>>,
}

/// Free buffers kept a class: at most this many bytes.
const KEEP_BYTES: usize = 16 << 20;

impl BufPool {
    pub(super) fn get(self: &Rc<Self>, len: usize) -> AlignedBuf {
        let capacity = capacity_for(len);
        let free = self
            .classes
            .borrow_mut()
            .get_mut(class_of(capacity))
            .and_then(Vec::pop);
        let ptr = free.unwrap_or_else(|| allocate(capacity));
        AlignedBuf::from_raw(ptr, capacity, len, Rc::downgrade(self))
    }

    fn put(&self, ptr: NonNull<u8>, capacity: usize) {
        let class = class_of(capacity);
        let mut classes = self.classes.borrow_mut();
        if classes.len() <= class {
            classes.resize_with(class + 1, Vec::new);
        }
        if (classes[class].len() + 1) * capacity <= KEEP_BYTES {
            classes[class].push(ptr);
        } else {
            // SAFETY: allocated by `allocate(capacity)`; the buffer that owned it is being dropped.
            unsafe { dealloc(ptr.as_ptr(), layout(capacity)) };
        }
    }
}

impl Drop for BufPool {
    fn drop(&mut self) {
        for (class, list) in self.classes.get_mut().drain(..).enumerate() {
            for ptr in list {
                // SAFETY: allocated with the class's capacity, and owned by the pool alone.
                unsafe { dealloc(ptr.as_ptr(), layout(BUF_ALIGN << class)) };
            }
        }
    }
}

fn capacity_for(len: usize) -> usize {
    len.max(BUF_ALIGN).next_power_of_two()
}

fn class_of(capacity: usize) -> usize {
    (capacity / BUF_ALIGN).trailing_zeros() as usize
}

fn layout(capacity: usize) -> Layout {
    // SAFETY: the alignment is a non-zero power of two and `capacity` a multiple of it; a capacity near
    // isize::MAX fails in `alloc_zeroed` long before.
    unsafe { Layout::from_size_align_unchecked(capacity, BUF_ALIGN) }
}

fn allocate(capacity: usize) -> NonNull<u8> {
    let layout = layout(capacity);
    // SAFETY: the layout's size is not zero.
    let ptr = unsafe { alloc_zeroed(layout) };
    NonNull::new(ptr).unwrap_or_else(|| handle_alloc_error(layout))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(parts: &mut [Vec<u8>]) -> Vec<iovec> {
        parts
            .iter_mut()
            .map(|p| iovec {
                iov_base: p.as_mut_ptr().cast(),
                iov_len: p.len(),
            })
            .collect()
    }

    #[test]
    fn cutting_a_list_keeps_the_bytes_in_order() {
        let mut parts = vec![vec![1, 2, 3], vec![], vec![4], vec![5, 6, 7, 8]];
        let segs = list(&mut parts);
        // SAFETY: the vectors outlive the list and are not touched meanwhile.
        let sg = unsafe { Sg::new(&segs) };
        for from in 0..=8 {
            for len in 0..=(8 - from) {
                let mut out = vec![0; len];
                assert_eq!(sg.slice(from, len).copy_to(&mut out), len);
                let want: Vec<u8> = (1..=8).skip(from).take(len).collect();
                assert_eq!(out, want);
                assert_eq!(sg.slice(from, len).iter().map(|p| p.1).sum::<usize>(), len);
            }
        }
        assert!(sg.whole().is_some());
        assert!(sg.slice(0, 7).whole().is_none());
    }

    #[test]
    fn a_pooled_buffer_comes_back() {
        let pool = Rc::new(BufPool::default());
        let first = pool.get(5000).as_ptr();
        let again = pool.get(8192);
        assert_eq!(first, again.as_ptr(), "same size class, same memory");
        assert_eq!(again.len(), 8192);
        assert_eq!(again.as_ptr() as usize % BUF_ALIGN, 0);
    }
}
