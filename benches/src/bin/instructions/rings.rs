//! The ring alone: a chain of three descriptors is taken, its buffers are found in memory, and it is returned.
//!
//! The reference is what `refstack` does for that, by the same calls: everything but the request itself.

use std::fs::File;
use std::sync::Arc;

use vhost_user_backend::{VringRwLock, VringState, VringT};
use vhost_user_frontend::{Buf, Memory, Notify, Virtqueue};
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use virtioblkd::shared_memory::SharedMemory;
use virtioblkd::virtio::inflight::InflightLayout;
use virtioblkd::virtio::memory::GuestMemory;
use virtioblkd::virtio::ring::{ChainBuf, Ring};
use vm_memory::{
    FileOffset, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend,
    GuestMemoryMmap,
};

use super::cases::{BATCH, GUEST_BYTES, QUEUE_SIZE, Result, RingCase, guest_memory, ring_config};

type ReferenceMemory = GuestMemoryMmap<()>;

/// Takes and returns all chains that are there. Its name is what callgrind is told.
#[inline(never)]
pub fn counted_own(ring: &mut Ring, memory: &GuestMemory, chains: &mut [ChainBuf]) -> Result<u64> {
    let mut count = 0;
    while let Some(slot) = ring.pop()? {
        let chain = &mut chains[usize::from(slot)];
        ring.read_chain(memory, slot, chain)?;
        let written = std::hint::black_box(&*chain).writable_len();
        ring.push_used(slot, written as u32);
        count += 1;
    }
    std::hint::black_box(ring.publish());
    Ok(count)
}

/// The same on the crates of the reference stack.
#[inline(never)]
pub fn counted_reference(
    vring: &VringRwLock,
    memory: &GuestMemoryAtomic<ReferenceMemory>,
    buffers: &mut Vec<libc::iovec>,
) -> Result<u64> {
    let guard = memory.memory();
    let memory: &ReferenceMemory = &guard;
    let mut state = vring.get_mut();
    let state: &mut VringState = &mut state;
    let queue = state.get_queue_mut();
    let chains: Vec<DescriptorChain<&ReferenceMemory>> = queue.iter(memory)?.collect();
    let mut count = 0;
    for chain in chains {
        let head = chain.head_index();
        buffers.clear();
        let mut written = 0;
        for buffer in chain {
            let slice = memory.get_slice(buffer.addr(), buffer.len() as usize)?;
            buffers.push(libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            });
            if buffer.is_write_only() {
                written += buffer.len();
            }
        }
        std::hint::black_box(&*buffers);
        queue.add_used(memory, head, written)?;
        count += 1;
    }
    std::hint::black_box(state.needs_notification()?);
    Ok(count)
}

/// The driver: makes batches available, and takes them back when `device` has returned them.
fn turns(
    ring: &mut Virtqueue,
    buffers: &[Buf],
    requests: u64,
    device: &mut dyn FnMut() -> Result<u64>,
) -> Result<()> {
    for _ in 0..requests / BATCH {
        for token in 0..BATCH {
            ring.add(buffers, token).ok_or("the ring is full")?;
        }
        ring.publish();
        if device()? != BATCH {
            return Err("the device has not taken the whole batch".into());
        }
        for _ in 0..BATCH {
            ring.pop_used()?.ok_or("the device has not returned all")?;
        }
    }
    Ok(())
}

fn buffers(memory: &Memory) -> [Buf; 3] {
    let at = memory.alloc(3 * 4096, 4096);
    [
        Buf::readable(at, 16),
        Buf::writable(at + 4096, 4096),
        Buf::writable(at + 8192, 1),
    ]
}

pub fn drive(case: RingCase, requests: u64) -> Result<()> {
    let (memory, mapped) = guest_memory()?;
    let packed = matches!(case, RingCase::Own { packed: true, .. });
    let mut driver = Virtqueue::new(&memory, QUEUE_SIZE, packed)?;
    driver.set_event_idx(true);
    driver.set_notify(Notify::Poll);
    let buffers = buffers(&memory);
    let config = ring_config(&driver, &mapped, packed)?;
    match case {
        RingCase::Own { inflight, .. } => {
            let layout = InflightLayout {
                queues: 1,
                queue_size: QUEUE_SIZE,
            };
            let kept = SharedMemory::create(c"inflight", layout.rest_at() as u64)?;
            let region = layout.queue(&kept, 0).filter(|_| inflight);
            let mut ring = Ring::new(&mapped, &config, region)?;
            let mut chains: Vec<ChainBuf> = (0..QUEUE_SIZE)
                .map(|_| ChainBuf::with_capacity(16))
                .collect();
            let mut device = || counted_own(&mut ring, &mapped, &mut chains);
            turns(&mut driver, &buffers, requests, &mut device)
        }
        RingCase::Reference => {
            let region = &memory.regions()[0];
            let file = FileOffset::new(File::from(region.file()?), region.spec().mmap_offset);
            let range = (GuestAddress(0), GUEST_BYTES as usize, Some(file));
            let reference = ReferenceMemory::from_ranges_with_files([range])?;
            let reference = GuestMemoryAtomic::from(Arc::new(reference));
            let vring = VringRwLock::new(reference.clone(), QUEUE_SIZE as usize as u16)?;
            vring.set_queue_size(QUEUE_SIZE);
            vring.set_queue_info(config.desc_table, config.avail_ring, config.used_ring)?;
            vring.set_queue_event_idx(true);
            vring.set_queue_ready(true);
            let mut gathered = Vec::with_capacity(16);
            let mut device = || counted_reference(&vring, &reference, &mut gathered);
            turns(&mut driver, &buffers, requests, &mut device)
        }
    }
}
