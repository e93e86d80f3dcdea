use super::*;
use crate::virtio::testing::{memory, write_bytes};

#[test]
fn a_pair_is_read_the_same_at_every_alignment() {
    let mem = memory(&[(0, 4096)]);
    let bytes: [u8; 16] = std::array::from_fn(|i| i as u8 + 1);
    for at in 100..116 {
        write_bytes(&mem, at, &bytes);
        let ptr = mem.host_ptr(at, 16).unwrap();
        // SAFETY: 16 mapped bytes.
        let pair = unsafe { read_pair(ptr) };
        assert_eq!(pair, (0x0807_0605_0403_0201, 0x100f_0e0d_0c0b_0a09));
    }
}

#[test]
fn the_descriptor_layout_is_that_of_virtio_queue() {
    use virtio_queue::desc::split::Descriptor;
    use vm_memory::ByteValued;
    let theirs = Descriptor::new(0x1122_3344_5566_7788, 0x99aa_bbcc, 0xddee, 0xff01);
    // SAFETY: 16 bytes of a local value.
    let (addr, rest) = unsafe { read_pair(theirs.as_slice().as_ptr()) };
    assert_eq!(addr, theirs.addr().0);
    assert_eq!(rest as u32, theirs.len());
    assert_eq!((rest >> 32) as u16, theirs.flags());
    assert_eq!((rest >> 48) as u16, theirs.next());
}

#[test]
fn a_chain_of_more_buffers_than_the_limit_is_refused() {
    let mem = memory(&[(0, 4096)]);
    let mut chain = ChainBuf::with_capacity(1);
    for _ in 0..MAX_IOVECS {
        chain.push(&mem, 0, 1, false).unwrap();
    }
    assert_eq!(chain.push(&mem, 0, 1, false), Err(ChainError::TooLong));
}
